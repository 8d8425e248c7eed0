"""The ops: public function, checks, shape inference and autograd. One module per op."""
