"""Trackers: programs that show the metrics of many runs side by side. One file each, named in configs/tracker."""
