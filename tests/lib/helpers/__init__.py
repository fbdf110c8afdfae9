"""What several test modules share: made-up models, ledgers, servers, and programs."""
