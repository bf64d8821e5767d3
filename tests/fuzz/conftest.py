"""The tiny corpus of the integration tests."""

from tests.integration.conftest import corpus

__all__ = ["corpus"]
