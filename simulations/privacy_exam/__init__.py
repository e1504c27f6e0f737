"""The exam of the privacy core: each item a function that measures, says its figure and its limit.

``python -m simulations.privacy_exam`` runs every item at its full count; the tests run the same functions
with fewer repetitions.
"""
