"""What the model itself says about a fact: other ways of asking it, peers of its subject, texts about its subject.

Most fact files hold one sentence a fact. An edit that sees one sentence forgets one sentence, so the model is made to
write the others. `elicit` does it all and keeps what it found; the other files hold one question to the model each.
"""
