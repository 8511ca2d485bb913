"""Model families with a tiny random model each, and what FASA does with them."""
