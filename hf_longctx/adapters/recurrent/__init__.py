"""Recurrent and convolutional layers on rows that ranks share, and on packed documents."""
