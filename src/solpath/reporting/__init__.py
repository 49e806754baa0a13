"""Show a family of models in files, charts and a page.

The demo, which makes a family, its task, its charts and its report enter here. Whatever the report
shows stands in `family.json`.
"""
