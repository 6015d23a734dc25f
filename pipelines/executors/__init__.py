"""Where units are scanned: `inline` in this process, `ray` on actors. Same work, same results."""
