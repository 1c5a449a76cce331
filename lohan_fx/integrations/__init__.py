"""Adapters to other libraries' training loops; each module needs the library it is named after."""
