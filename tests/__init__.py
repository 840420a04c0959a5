"""Tests of moespan; the folders mirror those of the package."""
