// The two doors of the page: signing in, and the first administrator of a new study.
import { useSignal } from '@preact/signals'
import { api, ApiError } from '../api'
import { readSession, session } from '../state'
import { Button, Field } from '../ui'

function useForm(send: (name: string, password: string) => Promise<unknown>) {
  const name = useSignal('')
  const password = useSignal('')
  const again = useSignal('')
  const code = useSignal('')
  const wrong = useSignal('')
  const busy = useSignal(false)
  const submit = async (e: Event) => {
    e.preventDefault()
    wrong.value = ''
    busy.value = true
    try {
      await send(name.value.trim(), password.value)
      await readSession()
    } catch (error) {
      wrong.value = error instanceof ApiError ? error.message : String(error)
    }
    busy.value = false
  }
  return { name, password, again, code, wrong, busy, submit }
}

function Frame({ title, note, children }: { title: string; note: string; children: preact.ComponentChildren }) {
  return (
    <main class="gate"><div class="gate-box">
      <img src="/favicon.svg" width="40" height="40" alt="" />
      <h1>{title}</h1><p>{note}</p>{children}
    </div></main>
  )
}

export function Login() {
  const f = useForm(api.login)
  return (
    <Frame title={session.value?.study || 'histokit review'} note="Sign in to score.">
      <form class="stack" onSubmit={f.submit}>
        <Field label="Name"><input name="username" required autoFocus autoComplete="username" value={f.name.value} onInput={(e) => { f.name.value = e.currentTarget.value }} /></Field>
        <Field label="Password"><input name="password" type="password" required autoComplete="current-password" value={f.password.value} onInput={(e) => { f.password.value = e.currentTarget.value }} /></Field>
        {f.wrong.value && <p class="notice bad" role="alert">{f.wrong.value}</p>}
        <Button type="submit" look="main" disabled={f.busy.value}>Sign in</Button>
      </form>
    </Frame>
  )
}

export function Setup() {
  const f = useForm((name, password) => {
    if (password !== f.again.value) throw new ApiError(422, 'The two passwords differ.')
    return api.setup(name, password, f.code.value.trim())
  })
  return (
    <Frame title="A new study" note="Make the account of its administrator; further people are added by this account.">
      <form class="stack" onSubmit={f.submit}>
        <Field label="Your name" note="It stands beside each of your scores."><input name="username" required autoFocus autoComplete="username" value={f.name.value} onInput={(e) => { f.name.value = e.currentTarget.value }} /></Field>
        <Field label="Password" note="At least eight characters."><input name="password" type="password" required minLength={8} autoComplete="new-password" value={f.password.value} onInput={(e) => { f.password.value = e.currentTarget.value }} /></Field>
        <Field label="Password again"><input name="again" type="password" required autoComplete="new-password" value={f.again.value} onInput={(e) => { f.again.value = e.currentTarget.value }} /></Field>
        {session.value?.setup_code_needed && <Field label="Code" note="The terminal in which the server runs shows it."><input required autoComplete="off" value={f.code.value} onInput={(e) => { f.code.value = e.currentTarget.value }} /></Field>}
        {f.wrong.value && <p class="notice bad" role="alert">{f.wrong.value}</p>}
        <Button type="submit" look="main" disabled={f.busy.value}>Begin</Button>
      </form>
    </Frame>
  )
}
