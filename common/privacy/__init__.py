"""Patient-level differential privacy: the plan, its accounting, the ledger, the policy and the verifier.

Nothing here imports torch, so that a privacy officer can plan and re-verify on any machine. The mechanism
itself is `client`'s; it reads its sampler, clip and noise from a `PrivacyPlan`, and so does the accounting.

The unit is the patient: all images of one person at one site. Neighbouring data sets differ by one patient
added or removed; replacing one is printed beside it. The server, other hospitals and outsiders are all
adversaries.
"""
