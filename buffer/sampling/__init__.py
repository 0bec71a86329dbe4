"""Which live rows a draw takes, and who has to wait."""
