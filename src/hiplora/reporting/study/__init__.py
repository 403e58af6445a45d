"""A study's tables, figures and page: from plain specifications to files."""
