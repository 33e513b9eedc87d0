"""What makes a longer row fit: less memory for the same numbers."""
