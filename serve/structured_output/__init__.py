"""Structured output: grammar constraints compiled from requests."""
