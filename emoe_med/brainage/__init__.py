"""Brain age from T1 MRI: the verbs of `python -m emoe_med.brainage`."""
