"""Runs day by day, from their records alone: list, follow, compare, clean up."""
