"""Routers, learned and fixed."""
