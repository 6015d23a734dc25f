"""The explorer: pages over an index for people who would rather look than read.

Each page is one module: a plain function from a question (`web.Ask`) to the values of a Jinja template of the
same name, registered in `app.py`. Invariants: nothing is written, nothing leaves the machine, and whatever
comes from a corpus, its metadata or the names of SAEs is escaped; a page is wholly told by its URL.
"""
