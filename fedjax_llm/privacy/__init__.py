"""Differential privacy: clipping, noise, mechanisms, accounting, calibration, and the ledger of what was released."""
