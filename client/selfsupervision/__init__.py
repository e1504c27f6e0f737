"""First weights for a student from a site's own images, without a mask: MAE and MoCo v3.

What is learned here is of the site's patients and stays at the site, like the student that grows from it.
"""

from client.selfsupervision.pretraining import pretrain, unmasked

__all__ = ["pretrain", "unmasked"]
