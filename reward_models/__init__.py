"""What scores a completion: verifiable rules, learned reward models, and the code that loads and combines them."""
