"""Attention kernels on virtual slots, one file per backend; see base.py for the protocol."""
