"""Suites: one base, its tasks' data and one expert a task, built from package registries alone."""
