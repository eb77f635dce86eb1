"""The verbs of the command line, a module each; none imports torch before it runs."""
