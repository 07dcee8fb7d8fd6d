"""Which tasks the app offers."""
