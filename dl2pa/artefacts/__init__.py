"""What people look at when a run is over: curves, confusions, classes, calibration, samples, and one page of it all.

Pure functions of what was measured; matplotlib is loaded on use.
"""
