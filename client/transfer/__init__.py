"""What a student learns from beside the labels: real crops and synthetic images, labelled by a teacher."""
