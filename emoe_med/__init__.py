"""Eigenbasis-routed mixture of experts for brain age from T1 MRI, on MONAI."""
