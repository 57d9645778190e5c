"""How other libraries' models and trainers reach the op; nothing inside the package imports these."""
