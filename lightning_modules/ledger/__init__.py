"""Deletion requests one after another, and a record of them that can be checked without the deleted text."""
