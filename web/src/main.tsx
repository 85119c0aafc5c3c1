import './style.css'
import { render } from 'preact'
import { App } from './app'
import { readSession } from './state'

void readSession()
render(<App />, document.getElementById('app')!)
