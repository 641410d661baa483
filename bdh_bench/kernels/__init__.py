"""The arithmetic that must be fast, each kernel with its slow truth in the tests."""
