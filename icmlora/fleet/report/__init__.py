"""`icm report`: a store as one HTML page that needs neither a network nor a server.

    report.py         the use case: read the store, write the page
    facts.py          the headline: what the fleet is, what it saves, what that costs
    task_table.py     a row for each task, as JSON for the page's table
    rate_picture.py   bytes against quality; the task map comes from `icmlora.fleet.map.picture`
    outputs.py        what base model, original and code write for some prompts, side by side
    page.py           all of it through the templates in page/: HTML, style sheet, script

Everything that is shown comes from a store, and so from anybody. It passes through `registry.names.escape`, then
through the template engine, which escapes it once more; the script only ever sets text. The page's
Content-Security-Policy names its style sheets and its script by their digests: nothing else could run or be fetched.
"""
