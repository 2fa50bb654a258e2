"""The commands that measure: plan-batch, calibrate, bench."""
