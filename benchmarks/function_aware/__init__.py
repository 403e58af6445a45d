"""Learning against drift with the function-aware basis: the runs, and the report on them."""
