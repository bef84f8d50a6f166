"""Routers, learned and fixed."""

from policies.attached import RoutedModel, attach
from policies.hub import push_router

__all__ = ["RoutedModel", "attach", "push_router"]
