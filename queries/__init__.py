"""From an index to answers: DuckDB views and macros over committed files, and text for people.

import queries
con = queries.connect("out/index")
con.sql("SELECT * FROM features ORDER BY max DESC LIMIT 10")
"""

from queries.connect import connect
from queries.lookup import time_limit

__all__ = ["connect", "time_limit"]
