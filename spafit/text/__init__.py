"""Text to token ids: vocabularies and WordPiece."""
