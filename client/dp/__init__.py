"""The differentially private mechanism at a site: one noised gradient a step, whose unit is the patient.

`mechanism` is the step; it draws patients (`poisson`) from a random source (`randomness`), takes one gradient
a patient (`onepass`, or `functional` as the reference), clips and sums (`clipping`), and adds noise. `tasks`
says what is trained on what, `trained` what is refused before it starts, `rehearsal` tests the build.
"""
