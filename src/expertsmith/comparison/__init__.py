"""Many methods side by side: one calibration, a plan and a judgement a cell, one table and one picture."""
