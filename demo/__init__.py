"""Teacher, student and distilled outputs side by side: service (plain functions), page (widgets), viewer (assets)."""
