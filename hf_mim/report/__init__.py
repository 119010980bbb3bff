"""A run, or several side by side, as one HTML page that needs nothing else: no network, no script.

from hf_mim.report.write import write_report

write_report(["runs/textures_mae"])  # runs/textures_mae/report.html; or: hf-mim report runs/textures_mae
"""
