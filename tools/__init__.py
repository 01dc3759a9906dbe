"""Speed measurements and exports."""
