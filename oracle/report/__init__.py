"""Verdicts for people: the certificate and its page."""
