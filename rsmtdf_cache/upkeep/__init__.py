"""Keep a store sound and as large as it needs to be: canary, repair, drop and gc, merge and diff."""
