"""What runs and layouts reached: measured side by side, and written up.

In: Configurations to measure; folders of runs, files of figures.
Out: JSON of figures with where they come from; a report as Markdown and HTML.
May import: planning and the rooms below it.
Start with benchmark.py, then scaling_report.py.
"""
