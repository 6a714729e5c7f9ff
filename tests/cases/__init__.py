"""Cases with known truths for the local learning coefficient: closed forms, problems, exact-sampling references.

Nothing here imports the package under test.
"""
