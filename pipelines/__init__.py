"""From a corpus to commits: reading, units, contexts, the scan of one unit, executors, the ledger.

`schema`, `storage` and `ledger` are light (no torch, no Ray) and shared with the room that queries.
"""
