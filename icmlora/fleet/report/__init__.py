"""`icm report`: a store as one HTML page that needs neither a network nor a server.

    report.py         the use case: read the store, write the page
    facts.py          the summary: size of the fleet, saving and loss
    task_table.py     a row for each task, as JSON for the page's table
    rate_picture.py   size against quality; the task map comes from `icmlora.fleet.map.picture`
    outputs.py        text by base model, original and code for some prompts, side by side
    page.py           renders the templates in page/: HTML, style sheet, script

All data comes from a store and is untrusted. It passes through `registry.names.escape`, then through the template
engine, which escapes it again. The script only sets text. The page's Content-Security-Policy allows only its own style
sheets and script, by digest.
"""
