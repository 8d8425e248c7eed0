"""The ops: public function, shape inference and autograd."""
