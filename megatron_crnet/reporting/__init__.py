"""Benchmarks of configurations, and reports of runs, benchmarks, estimates and simulations.

In: Configurations to measure; folders of runs, files of figures.
Out: JSON of figures with their command, machine and versions; a report as Markdown and HTML.
May import: planning and the sub-packages below it.
Start with benchmark.py, then scaling_report.py.
"""
