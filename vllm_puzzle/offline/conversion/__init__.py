"""One run of the converter, resumable and parallel: calibration, the choice of pairs, units of work, the journal."""
